-- Since when an account is being erased, or is: nobody signs in to it any more.
ALTER TABLE users ADD COLUMN closed_at BIGINT;
