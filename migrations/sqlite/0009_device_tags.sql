-- Labels by which devices are addressed together.
CREATE TABLE IF NOT EXISTS device_tags (
    device_seq INTEGER NOT NULL,
    tag BLOB NOT NULL,
    PRIMARY KEY (device_seq, tag)
) STRICT, WITHOUT ROWID;
