"""Studies: variants of one recipe, each trained with several seeds, compared at equal compute.

study file -> recipes of all runs -> cost of a step -> steps at equal compute -> runs -> records -> study.json
"""
