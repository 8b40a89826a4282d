-- The limits that administrators of the installation set for an organization; the others are the installation's.
CREATE TABLE organization_quotas (
    organization_id UUID PRIMARY KEY NOT NULL REFERENCES organizations (id),
    -- A JSON object: the names of quantities, with their limits.
    quotas TEXT NOT NULL,
    sequence BIGINT NOT NULL
);

-- Who made it: one user makes no more than so many.
ALTER TABLE organizations ADD COLUMN created_by UUID;
UPDATE organizations SET created_by = (
    SELECT user_id FROM members WHERE members.organization_id = organizations.id ORDER BY joined_at, user_id LIMIT 1
);
CREATE INDEX organizations_made_by ON organizations (created_by) WHERE deleted_at IS NULL;
