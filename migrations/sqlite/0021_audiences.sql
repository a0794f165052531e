-- How far an audience that is resolved piece by piece has come: a row from its first piece to its last.
CREATE TABLE IF NOT EXISTS audiences (
    notification_id BLOB NOT NULL PRIMARY KEY,
    reached INTEGER NOT NULL, -- of tags and everyone: the device's number; of a list: the place. All up to it is resolved
    up_to INTEGER NOT NULL    -- where it ends, fixed at the first piece
) STRICT;
