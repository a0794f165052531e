-- Since when housekeeping has seen a device inactive or suspended; stale once the device has registered after it.
CREATE TABLE IF NOT EXISTS inactive_devices (
    device_seq INTEGER NOT NULL PRIMARY KEY,
    since INTEGER NOT NULL
) STRICT;
