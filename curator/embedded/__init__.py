"""The zero-set-up default: a PostgreSQL and a broker of the project's own, and the supervisor of its daemon.

``postgres.EmbeddedPostgres`` and ``broker.EmbeddedBroker`` share the semantics of ``server.Server``: whoever
needs one acquires it, the first starts it, the last to release stops it, and after ``kill -9`` of anything
the next acquire puts it right.
"""
