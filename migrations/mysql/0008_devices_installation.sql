-- devices_installation: made with its table.
DO 0;
