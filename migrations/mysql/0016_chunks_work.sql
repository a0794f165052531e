-- chunks_work: made with its table.
DO 0;
