-- Who may call what. Only a hash of the secret is kept.
CREATE TABLE IF NOT EXISTS api_keys (
    id TEXT NOT NULL PRIMARY KEY,
    hash BLOB NOT NULL,
    owner TEXT NOT NULL,
    scopes TEXT NOT NULL, -- separated by commas
    topics TEXT NULL,     -- separated by commas; NULL: all
    created_at INTEGER NOT NULL,
    expires_at INTEGER NULL,
    revoked_at INTEGER NULL
) STRICT, WITHOUT ROWID;
