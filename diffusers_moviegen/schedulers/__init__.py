from .scheduling_flow_match_linear_quadratic import (
    FlowMatchLinearQuadraticScheduler,
    FlowMatchLinearQuadraticSchedulerOutput,
)
from .scheduling_flow_match_midpoint import FlowMatchMidpointScheduler, FlowMatchMidpointSchedulerOutput


__all__ = [
    "FlowMatchLinearQuadraticScheduler",
    "FlowMatchLinearQuadraticSchedulerOutput",
    "FlowMatchMidpointScheduler",
    "FlowMatchMidpointSchedulerOutput",
]
