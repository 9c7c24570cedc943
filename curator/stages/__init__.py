"""The write side: every stage is the same four functions, run by ``turn``.

* ``claim(connection, settings)``: a short transaction that leases work and reads what it needs;
* ``load(engine, settings, batch)``: what outlives a batch (a model, directions), kept from turn to turn;
* ``compute(tools, batch)``: the work, with no connection and no transaction open;
* ``record(connection, settings, batch, result)``: a short transaction; effect and state change together.
"""
