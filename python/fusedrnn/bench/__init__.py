"""What ``python -m fusedrnn bench`` measures, and how.

``grid`` names the shapes, ``contestants`` who runs them, ``timer`` how they are timed; ``overhead`` and ``memory``
measure a call's fixed cost and what training keeps; ``results`` is the record, ``tables`` and ``plots`` show it;
``run`` puts them together.
"""
