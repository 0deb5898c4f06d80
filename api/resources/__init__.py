"""Falcon resources, one module per path of DESIGN.md section 8."""
