"""What ``python -m fusedrnn bench`` measures, and how.

``grid`` names the shapes, ``contestants`` and ``peers`` who runs them, ``timer`` how they are timed. On the CPU a
``driver`` runs each contestant as a ``worker``, a process of its own, by turns; ``limits`` tells what the machine could
do at best. ``overhead``, ``cost``, ``memory`` and ``accuracy`` measure what the grid does not show; ``results`` is the
record, ``tables`` and ``plots`` show it; ``run`` puts them together, ``gpu`` does so on a GPU.
"""
