"""Readers: what people have -> records or refusals. Nothing here knows of SQL, and no source is ever written to."""
