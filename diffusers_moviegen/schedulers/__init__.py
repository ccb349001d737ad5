from .scheduling_flow_match_linear_quadratic import (
    FlowMatchLinearQuadraticScheduler,
    FlowMatchLinearQuadraticSchedulerOutput,
)


__all__ = ["FlowMatchLinearQuadraticScheduler", "FlowMatchLinearQuadraticSchedulerOutput"]
