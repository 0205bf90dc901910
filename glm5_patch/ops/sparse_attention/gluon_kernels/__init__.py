"""Gluon kernels of sparse attention for GLM-5's own shape on Hopper.

In Gluon, because the layouts matter, and because the warps of a program do different work. A
program works on one query and 64 heads. Pointers and their shapes are those of ``triton_kernels``,
with n = ``groups`` * 64.
"""
