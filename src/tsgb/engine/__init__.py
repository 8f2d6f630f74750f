"""The engine: a forward recorded as a tape of ATen operators, and one walk back for all classes.

`tape` records what the model runs; `memory` tells writes and views apart, `provenance` what was there before. `lookup`
finds each operator's rule in a table; `kinds` has the five kinds of rule, `terms` what flows backward. `heads` finds
the head, `walk` goes back and records what a fused map is made of. `operators` and `supported` know ATen's names.
"""
