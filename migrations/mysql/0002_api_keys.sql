-- Who may call what. Only a hash of the secret is kept.
CREATE TABLE IF NOT EXISTS api_keys (
    id CHAR(16) CHARACTER SET ascii COLLATE ascii_bin NOT NULL PRIMARY KEY,
    hash BINARY(32) NOT NULL,
    owner VARCHAR(255) NOT NULL,
    scopes VARCHAR(255) CHARACTER SET ascii COLLATE ascii_bin NOT NULL, -- separated by commas
    topics TEXT CHARACTER SET ascii COLLATE ascii_bin NULL,             -- separated by commas; NULL: all
    created_at BIGINT NOT NULL,
    expires_at BIGINT NULL,
    revoked_at BIGINT NULL
) ENGINE=InnoDB DEFAULT CHARACTER SET utf8mb4 COLLATE utf8mb4_bin;
