-- What all replicas share: min_reader, the marker inside a backup, shared secrets.
CREATE TABLE IF NOT EXISTS service_facts (
    name VARCHAR(64) CHARACTER SET ascii COLLATE ascii_bin NOT NULL PRIMARY KEY,
    value VARBINARY(4096) NOT NULL
) ENGINE=InnoDB DEFAULT CHARACTER SET utf8mb4 COLLATE utf8mb4_bin;
