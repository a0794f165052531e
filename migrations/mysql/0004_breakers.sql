-- Credentials that APNs refuses. A row is an open breaker; chunks that wait for it have holder -(1000 + id).
CREATE TABLE IF NOT EXISTS breakers (
    id BIGINT NOT NULL AUTO_INCREMENT PRIMARY KEY,
    topic VARCHAR(155) CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
    environment VARCHAR(16) CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
    fingerprint VARCHAR(64) CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
    opened_at BIGINT NOT NULL,
    apns_status SMALLINT NOT NULL,
    reason VARCHAR(128) NOT NULL,
    next_probe_at BIGINT NOT NULL,
    probes INT NOT NULL,
    UNIQUE KEY breakers_credential (topic, environment, fingerprint),
    CONSTRAINT breakers_environment CHECK (environment IN ('production', 'sandbox'))
) ENGINE=InnoDB DEFAULT CHARACTER SET utf8mb4 COLLATE utf8mb4_bin;
