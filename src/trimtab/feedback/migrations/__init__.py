"""The steps by which the tables came to be; `store.open_store` takes those a store has not had."""
