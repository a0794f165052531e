-- inactive_devices_since: made with its table.
DO 0;
