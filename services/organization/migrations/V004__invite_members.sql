-- Memberships that wait for their person's answer. They give no right to anything.
CREATE TABLE invitations (
    id UUID PRIMARY KEY NOT NULL,
    organization_id UUID NOT NULL REFERENCES organizations (id),
    user_id UUID NOT NULL,
    role TEXT NOT NULL CHECK (role IN ('viewer', 'developer', 'admin', 'owner')),
    invited_by UUID NOT NULL,
    created_at BIGINT NOT NULL,
    expires_at BIGINT NOT NULL,
    UNIQUE (organization_id, user_id)
);
CREATE INDEX invitations_of_user ON invitations (user_id);

-- What is gone keeps no name: it may be a person's.
UPDATE organizations SET name = 'deleted', slug = 'deleted', personal_of = NULL WHERE deleted_at IS NOT NULL;
