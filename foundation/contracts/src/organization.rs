//! Organizations, their members, and who may do what in them.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{Count, Empty, Event, Page, Role, Timestamp, Uuid, message};

/// A group of people who own projects together.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Organization {
    pub id: Uuid,
    pub name: String,
    /// Unique in the installation.
    pub slug: String,
    /// Made for one person at registration.
    pub personal: bool,
    pub created_at: Timestamp,
    /// The caller's role in it.
    pub role: Role,
}

/// The organizations that the caller is a member of.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ListOrganizations {}
message!(ListOrganizations, query "organization.list_organizations", SignedIn => Page<Organization>);

/// Creates an organization owned by the caller.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct CreateOrganization {
    pub name: String,
    /// Made from the name when absent.
    #[serde(default)]
    pub slug: Option<String>,
}
message!(CreateOrganization, command "organization.create_organization", SignedIn => Organization, |m, check| {
    check.title("name", &m.name);
    if let Some(slug) = &m.slug {
        check.label("slug", slug);
    }
});

/// One organization.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct GetOrganization {
    pub id: Uuid,
}
message!(GetOrganization, query "organization.get_organization", Granted(OrgView) at Organization(id) => Organization);

/// Renames an organization.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct UpdateOrganization {
    pub id: Uuid,
    #[serde(default)]
    pub name: Option<String>,
}
message!(UpdateOrganization, command "organization.update_organization", Granted(OrgManage) at Organization(id) => Organization, |m, check| {
    if let Some(name) = &m.name {
        check.title("name", name);
    }
});

/// Deletes an organization with all that is in it. Owners only.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct DeleteOrganization {
    pub id: Uuid,
    /// Confirms the act: the caller's password, or the local token where the caller has none.
    #[serde(default)]
    #[schema(format = Password)]
    pub password: Option<String>,
}
message!(DeleteOrganization, command "organization.delete_organization", Granted(OrgManage) at Organization(id) => Empty);

/// A person's place in an organization.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Member {
    pub user_id: Uuid,
    pub email: String,
    pub name: String,
    pub role: Role,
    /// Whether the person has not accepted yet: a pending member has no rights.
    #[serde(default)]
    pub pending: bool,
    /// Since when they are a member, or are pending.
    pub joined_at: Timestamp,
}

/// The members of an organization, and those who have not accepted yet.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ListMembers {
    pub id: Uuid,
}
message!(ListMembers, query "organization.list_members", Granted(OrgView) at Organization(id) => Page<Member>);

/// Invites a person to an organization. They are a pending member, without rights, until they accept. For an address
/// that has no account, the reply has a registration token, which is shown this once.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct AddMember {
    pub id: Uuid,
    pub email: String,
    pub role: Role,
}
message!(AddMember, command "organization.add_member", Granted(OrgManage) at Organization(id) => AddedMember);

/// A person who was invited to an organization.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct AddedMember {
    pub user_id: Uuid,
    pub email: String,
    pub role: Role,
    /// Always true: the person has not accepted yet.
    pub pending: bool,
    /// Until when they can accept.
    pub expires_at: Timestamp,
    /// What the person registers with, where the address has no account: it works once, for this address. Give it to
    /// them in a link, after the `#`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(format = Password)]
    pub registration_token: Option<String>,
}

/// Changes a member's role, pending or not. Only an owner makes or unmakes owners; the last owner stays one.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ChangeRole {
    pub id: Uuid,
    pub user_id: Uuid,
    pub role: Role,
}
message!(ChangeRole, command "organization.change_role", Granted(OrgManage) at Organization(id) => Empty);

/// Removes a member, pending or not, from an organization.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct RemoveMember {
    pub id: Uuid,
    pub user_id: Uuid,
}
message!(RemoveMember, command "organization.remove_member", Granted(OrgManage) at Organization(id) => Empty);

/// Leaves an organization; its last owner cannot.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct LeaveOrganization {
    pub id: Uuid,
}
message!(LeaveOrganization, command "organization.leave_organization", Granted(OrgView) at Organization(id) => Empty);

/// The invitations that wait for the caller's answer.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ListInvitations {}
message!(ListInvitations, query "organization.list_invitations", SignedIn => Page<Invitation>);

/// An invitation to an organization. Nothing follows from it before it is accepted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Invitation {
    pub id: Uuid,
    pub organization_id: Uuid,
    pub organization_name: String,
    pub organization_slug: String,
    /// The role that the caller will have.
    pub role: Role,
    /// The e-mail address of whoever invited; absent if their account is gone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub invited_by: Option<String>,
    pub created_at: Timestamp,
    pub expires_at: Timestamp,
}

/// Accepts an invitation: the caller becomes a member.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct AcceptInvitation {
    pub id: Uuid,
}
message!(AcceptInvitation, command "organization.accept_invitation", SignedIn => Organization);

/// Rejects an invitation.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct RejectInvitation {
    pub id: Uuid,
}
message!(RejectInvitation, command "organization.reject_invitation", SignedIn => Empty);

/// What each role may do.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ListPermissions {}
message!(ListPermissions, query "organization.list_permissions", SignedIn => Page<RolePermissions>);

/// A role with its permissions.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct RolePermissions {
    pub role: Role,
    pub permissions: Vec<crate::Permission>,
}

/// A user's place in an organization, asked by a service whose own cache does not know it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
pub struct GetMembership {
    pub organization_id: Uuid,
    pub user_id: Uuid,
}
message!(GetMembership, query "organization.get_membership", Internal => Membership);

/// A user's place in an organization, as the owner of the fact knows it. `role` is null for one who
/// is not, or no longer, a member.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Membership {
    pub organization_id: Uuid,
    pub user_id: Uuid,
    pub role: Option<Role>,
    /// Rises with each change; a lower one is older.
    pub sequence: i64,
}

/// Several users' places in organizations: asked about those that have a stream open.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct GetMemberships {
    pub wanted: Vec<GetMembership>,
}
message!(GetMemberships, query "organization.get_memberships", Internal => Page<Membership>);

/// A membership came to be, changed or ended.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MembershipChanged {
    #[serde(flatten)]
    pub membership: Membership,
}
impl Event for MembershipChanged {
    const TYPE: &'static str = "organization.membership_changed";
    const VERSION: u16 = 1;
    fn subject(&self) -> Uuid {
        self.membership.organization_id
    }
}

/// An organization came to be.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct OrganizationCreated {
    pub organization_id: Uuid,
    pub name: String,
    pub slug: String,
    pub owner_id: Uuid,
}
impl Event for OrganizationCreated {
    const TYPE: &'static str = "organization.organization_created";
    const VERSION: u16 = 1;
    fn subject(&self) -> Uuid {
        self.organization_id
    }
}

/// An organization was deleted; what belongs to it must go.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct OrganizationDeleted {
    pub organization_id: Uuid,
}
impl Event for OrganizationDeleted {
    const TYPE: &'static str = "organization.organization_deleted";
    const VERSION: u16 = 1;
    fn subject(&self) -> Uuid {
        self.organization_id
    }
}

/// Whether a user may leave every organization: not while one with other members has no other owner.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct CheckLeaving {
    pub user_id: Uuid,
}
message!(CheckLeaving, query "organization.check_leaving", Internal => Empty);

/// Takes a user out of every organization; those they were alone in are deleted.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct LeaveOrganizations {
    pub user_id: Uuid,
}
message!(LeaveOrganizations, command "organization.leave_organizations", Internal => Empty);

/// How many organizations a user is in.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct CountMemberships {
    pub user_id: Uuid,
}
message!(CountMemberships, query "organization.count_memberships", Internal => Count);
