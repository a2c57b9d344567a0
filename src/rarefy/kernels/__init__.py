"""Compiled products of stored matrices with activations, behind torch operators.

The library is plain C++ without Python or torch in it (``csrc/``, compiled when rarefy is installed
where a compiler exists) and is called through ctypes. Every operator has a reference in torch, with
which tests compare and which runs where the library cannot.
"""
