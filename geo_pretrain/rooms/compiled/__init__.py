"""Rooms rendered by compiled loops (extra `fast`), some ten times faster than by torch on a CPU; see `renderer`.

`casting`: which part a ray meets, which points see a light. `patterns`: colors of surfaces. `shading`: light, images.
"""
