"""Measurements of memplan itself: accuracy against published runs, speed, and jobs whose answer is known."""
