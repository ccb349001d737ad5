"""Toybox: a small world of pictures, films and sounds in which a program can check every caption."""

from .data import dataset


__all__ = ["dataset"]
