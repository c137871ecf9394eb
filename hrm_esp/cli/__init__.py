"""The command ``hrm-esp``."""

from .main import main as main
from .parser import build_parser as build_parser
