-- What was accepted for devices of broadcasts: of each block of 256 numbers a mark of 4 bytes each, so that a broadcast need
-- not write each device's row. 0: nothing; else the seconds since 2020-01-01T00:00:00Z doubled, and 1 more in the sandbox.
-- version moves on whenever a token or an environment of its devices is replaced.
CREATE TABLE IF NOT EXISTS acceptances (
    block BIGINT NOT NULL PRIMARY KEY, -- a device's number divided by 256
    version BIGINT NOT NULL,
    marks VARBINARY(1024) NOT NULL
) ENGINE=InnoDB DEFAULT CHARACTER SET utf8mb4 COLLATE utf8mb4_bin;
