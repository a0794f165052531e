-- What all replicas share: min_reader, the marker inside a backup, shared secrets.
CREATE TABLE IF NOT EXISTS service_facts (
    name TEXT NOT NULL PRIMARY KEY,
    value BLOB NOT NULL
) STRICT, WITHOUT ROWID;
