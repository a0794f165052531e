-- devices_user: made with its table.
DO 0;
