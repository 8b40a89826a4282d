-- Since when an organization is being deleted: nobody finds it any more.
ALTER TABLE organizations ADD COLUMN closed_at BIGINT;
