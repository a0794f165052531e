-- How far an audience that is resolved piece by piece has come: a row from its first piece to its last.
CREATE TABLE IF NOT EXISTS audiences (
    notification_id BINARY(16) NOT NULL PRIMARY KEY,
    reached BIGINT NOT NULL, -- of tags and everyone: the device's number; of a list: the place. All up to it is resolved
    up_to BIGINT NOT NULL    -- where it ends, fixed at the first piece
) ENGINE=InnoDB DEFAULT CHARACTER SET utf8mb4 COLLATE utf8mb4_bin;
