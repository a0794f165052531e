-- Who is alive: beat moves every second. No clock is compared.
CREATE TABLE IF NOT EXISTS replicas (
    id INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,
    name TEXT NOT NULL,
    version TEXT NOT NULL,
    beat INTEGER NOT NULL,
    started_at INTEGER NOT NULL
) STRICT;
