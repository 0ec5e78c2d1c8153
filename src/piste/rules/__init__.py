"""The mathematics of optimizers, one formula each, with nothing around it: no devices, dtypes, engines or storage.

A rule reads like its paper: ``g`` is the gradient, ``st`` the states, ``hp`` the hyper-parameters, ``t`` the weight's
own step number from 1. See :mod:`piste.slots` for how a rule becomes part of an optimizer.
"""
