-- Labels by which devices are addressed together.
CREATE TABLE IF NOT EXISTS device_tags (
    device_seq BIGINT NOT NULL,
    tag VARBINARY(64) NOT NULL,
    PRIMARY KEY (device_seq, tag),
    KEY device_tags_tag (tag, device_seq)
) ENGINE=InnoDB DEFAULT CHARACTER SET utf8mb4 COLLATE utf8mb4_bin;
