-- A number outlives its device, so that outcomes can still be told apart, until retention.
CREATE TABLE IF NOT EXISTS device_tombstones (
    seq BIGINT NOT NULL PRIMARY KEY,
    id BINARY(16) NOT NULL,
    token_hint VARCHAR(6) CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
    forgotten_at BIGINT NOT NULL
) ENGINE=InnoDB DEFAULT CHARACTER SET utf8mb4 COLLATE utf8mb4_bin;
