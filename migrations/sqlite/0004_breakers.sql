-- Credentials that APNs refuses. A row is an open breaker; chunks that wait for it have holder -(1000 + id).
CREATE TABLE IF NOT EXISTS breakers (
    id INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,
    topic TEXT NOT NULL,
    environment TEXT NOT NULL CHECK (environment IN ('production', 'sandbox')),
    fingerprint TEXT NOT NULL,
    opened_at INTEGER NOT NULL,
    apns_status INTEGER NOT NULL,
    reason TEXT NOT NULL,
    next_probe_at INTEGER NOT NULL,
    probes INTEGER NOT NULL,
    UNIQUE (topic, environment, fingerprint)
) STRICT;
