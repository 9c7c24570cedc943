"""Influence of one training example, in pure torch and numpy: no SQL, no files, no clock, no settings.

A tensor's name carries its shape. The dimension key of the package:

=====  ==================================================================================================
B      examples of a batch
T      positions of an example (tokens; 1 for a plain vector); all calls of a reused module, one after another
O, I   outputs and inputs of one layer; with ``bias`` the constant input 1 is the last of I
P, Q   rows and columns a neuron mask keeps
k      kept entries of one layer
K      kept entries of all layers, concatenated in the order of the layers
S      validation slices
V      validation examples
N      any sample: references, bootstrap draws
=====  ==================================================================================================

``a_BTI`` are a layer's inputs, ``d_BTO`` the gradients of the summed loss with respect to its outputs, so
``G_BOI = einsum("bto,bti->boi", d, a)`` is the per-example gradient, which is never formed in full.
``w`` is always a whitened gradient, ``unit`` one of length 1. Positive influence helps, negative harms.
"""
