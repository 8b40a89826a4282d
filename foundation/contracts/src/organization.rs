//! Organizations, their members, roles and invitations.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{Count, Empty, Event, Page, Role, Timestamp, Uuid, list, message};

/// A group of users who own projects together.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Organization {
    pub id: Uuid,
    pub name: String,
    /// Unique in the installation.
    pub slug: String,
    /// Whether it was created for one user at registration.
    pub personal: bool,
    pub created_at: Timestamp,
    /// The caller's role in the organization.
    pub role: Role,
}

list! {
    /// Lists the organizations that the caller is a member of.
    ListOrganizations by ["created_at", "name", "slug"] {
        /// Only those whose name begins with this.
        name_prefix: Option<String>,
    }
}
message!(ListOrganizations, query "organization.list_organizations", SignedIn => Page<Organization>, |m, check| check.list(m));

/// Creates an organization. The caller becomes its owner.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct CreateOrganization {
    pub name: String,
    /// Default: derived from the name.
    #[serde(default)]
    pub slug: Option<String>,
}
message!(CreateOrganization, command "organization.create_organization", SignedIn => Organization, |m, check| {
    check.title("name", &m.name);
    if let Some(slug) = &m.slug {
        check.label("slug", slug);
    }
});

/// Returns an organization.
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

/// Deletes an organization with everything in it. Owners only.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct DeleteOrganization {
    pub id: Uuid,
    /// The caller's password as a confirmation; for an account without a password, the server's local token.
    #[serde(default)]
    #[schema(format = Password)]
    pub password: Option<String>,
}
message!(DeleteOrganization, command "organization.delete_organization", Granted(OrgManage) at Organization(id) => Empty);

/// A member of an organization.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Member {
    pub user_id: Uuid,
    pub email: String,
    pub name: String,
    pub role: Role,
    /// Whether the user has not accepted the invitation yet. A pending member has no permissions.
    #[serde(default)]
    pub pending: bool,
    /// When the user became a member or was invited.
    pub joined_at: Timestamp,
}

list! {
    /// Lists the members of an organization, including pending members.
    ListMembers by ["joined_at"] {
        id: Uuid,
        /// Only members with this role.
        role: Option<Role>,
        /// Only pending members, or only others.
        pending: Option<bool>,
    }
}
message!(ListMembers, query "organization.list_members", Granted(OrgView) at Organization(id) => Page<Member>, |m, check| check.list(m));

/// Invites a user to an organization. The user is a pending member, without permissions, until they accept. For an
/// address that has no account, the reply has a registration token, which is shown only once.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct AddMember {
    pub id: Uuid,
    pub email: String,
    pub role: Role,
}
message!(AddMember, command "organization.add_member", Granted(OrgManage) at Organization(id) => AddedMember; credentials);

/// A user who was invited to an organization.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct AddedMember {
    pub user_id: Uuid,
    pub email: String,
    pub role: Role,
    /// Always true: the user has not accepted the invitation yet.
    pub pending: bool,
    /// When the invitation expires.
    pub expires_at: Timestamp,
    /// The token to register with, if the address has no account. It can be used once, by this address. Send it in a
    /// link, after the `#`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(format = Password)]
    pub registration_token: Option<String>,
}

/// Changes the role of a member or pending member. Only owners can give or remove the role owner; the last owner
/// keeps it.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ChangeRole {
    pub id: Uuid,
    pub user_id: Uuid,
    pub role: Role,
}
message!(ChangeRole, command "organization.change_role", Granted(OrgManage) at Organization(id) => Empty);

/// Removes a member or pending member from an organization.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct RemoveMember {
    pub id: Uuid,
    pub user_id: Uuid,
}
message!(RemoveMember, command "organization.remove_member", Granted(OrgManage) at Organization(id) => Empty);

/// Leaves an organization. The last owner cannot leave.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct LeaveOrganization {
    pub id: Uuid,
}
message!(LeaveOrganization, command "organization.leave_organization", Granted(OrgView) at Organization(id) => Empty);

list! {
    /// Lists the caller's open invitations.
    ListInvitations by ["created_at"] {}
}
message!(ListInvitations, query "organization.list_invitations", SignedIn => Page<Invitation>, |m, check| check.list(m));

/// An invitation to an organization. It has no effect until it is accepted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Invitation {
    pub id: Uuid,
    pub organization_id: Uuid,
    pub organization_name: String,
    pub organization_slug: String,
    /// The role that the caller gets.
    pub role: Role,
    /// The e-mail address of the user who sent it. Absent if their account was erased.
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
message!(AcceptInvitation, command "organization.accept_invitation", Invited at Invitation(id) => Organization);

/// Rejects an invitation.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct RejectInvitation {
    pub id: Uuid,
}
message!(RejectInvitation, command "organization.reject_invitation", SignedIn => Empty);

/// Lists the permissions of each role.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ListPermissions {}
message!(ListPermissions, query "organization.list_permissions", SignedIn => Page<RolePermissions>);

/// A role with its permissions.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct RolePermissions {
    pub role: Role,
    pub permissions: Vec<crate::Permission>,
}

/// Returns a user's membership. Sent by a service whose cache has no valid entry for it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
pub struct GetMembership {
    pub organization_id: Uuid,
    pub user_id: Uuid,
}
message!(GetMembership, query "organization.get_membership", Internal => Membership);

/// A user's membership of an organization, from the organization service. `role` is null if the user is not a member.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Membership {
    pub organization_id: Uuid,
    pub user_id: Uuid,
    pub role: Option<Role>,
    /// Increases with each change.
    pub sequence: i64,
}

/// Returns several users' memberships. Sent for the users with open streams.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct GetMemberships {
    pub wanted: Vec<GetMembership>,
}
message!(GetMemberships, query "organization.get_memberships", Internal => Page<Membership>);

/// A membership was created, changed or removed.
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

/// An organization was created.
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

/// An organization was deleted. Consumers delete everything that belongs to it.
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

/// Checks that a user can leave every organization. Refused if an organization with other members has no other owner.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct CheckLeaving {
    pub user_id: Uuid,
}
message!(CheckLeaving, query "organization.check_leaving", Internal => Empty);

/// Removes a user from every organization. Organizations without other members are deleted.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct LeaveOrganizations {
    pub user_id: Uuid,
}
message!(LeaveOrganizations, command "organization.leave_organizations", Internal => Empty);

/// Counts the organizations that a user is a member of.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct CountMemberships {
    pub user_id: Uuid,
}
message!(CountMemberships, query "organization.count_memberships", Internal => Count);
