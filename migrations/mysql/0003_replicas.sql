-- Who is alive: beat moves every second. No clock is compared.
CREATE TABLE IF NOT EXISTS replicas (
    id BIGINT NOT NULL AUTO_INCREMENT PRIMARY KEY,
    name VARCHAR(255) NOT NULL,
    version VARCHAR(64) NOT NULL,
    beat BIGINT NOT NULL,
    started_at BIGINT NOT NULL
) ENGINE=InnoDB DEFAULT CHARACTER SET utf8mb4 COLLATE utf8mb4_bin;
