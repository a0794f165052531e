-- cohorts_holder: made with its table.
DO 0;
