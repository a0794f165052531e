-- Since when housekeeping has seen a device inactive or suspended; stale once the device has registered after it.
CREATE TABLE IF NOT EXISTS inactive_devices (
    device_seq BIGINT NOT NULL PRIMARY KEY,
    since BIGINT NOT NULL,
    KEY inactive_devices_since (since, device_seq)
) ENGINE=InnoDB DEFAULT CHARACTER SET utf8mb4 COLLATE utf8mb4_bin;
