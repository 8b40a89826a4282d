//! What carries messages between processes: the seam that a broker's client fills in.
//!
//! A transport moves bytes. What they mean, who may read them and who made them is settled above it.

use std::sync::Arc;
use std::time::Duration;

use capsule_contracts::Problem;
use futures_util::future::BoxFuture;

/// A request on its way: sealed bytes for whoever serves the subject.
#[derive(Clone, Debug)]
pub struct Outgoing {
    pub subject: &'static str,
    pub body: Vec<u8>,
    /// A reply that comes later is of no use.
    pub patience: Duration,
}

/// An event on its way to every service that wants its kind.
#[derive(Clone, Debug)]
pub struct Published {
    /// `CloudEvents` `type`.
    pub kind: String,
    /// Events of one key are delivered in their order, where the transport keeps any.
    pub key: String,
    /// The envelope, as JSON.
    pub body: Vec<u8>,
    /// Proof that a process of this installation says so.
    pub signature: String,
}

/// Why an event was not taken.
#[derive(Debug)]
pub enum Refusal {
    /// It may be later.
    Later(Problem),
    /// It never will be: it is not understood, or nobody of this installation said it.
    Never(Problem),
}

/// Answers a request; the reply is sealed again.
pub type Answer = Arc<dyn Fn(Vec<u8>) -> BoxFuture<'static, Vec<u8>> + Send + Sync>;
/// Takes an event (body and signature) into safe keeping.
pub type Receive = Arc<dyn Fn(Vec<u8>, String) -> BoxFuture<'static, Result<(), Refusal>> + Send + Sync>;
/// Keeps what could never be taken, and why, for people to look at.
pub type SetAside = Arc<dyn Fn(Vec<u8>, String) -> BoxFuture<'static, Result<(), Problem>> + Send + Sync>;

/// A service as its transport knows it.
#[derive(Clone)]
pub struct Served {
    pub name: &'static str,
    /// The subjects it answers.
    pub subjects: Vec<&'static str>,
    /// The kinds of event it wants.
    pub kinds: Vec<&'static str>,
    pub answer: Answer,
    pub receive: Receive,
    pub set_aside: SetAside,
}

impl std::fmt::Debug for Served {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Served({})", self.name)
    }
}

/// A broker, as the bus needs it. Each call goes on over lost connections until its patience ends.
pub trait Transport: Send + Sync + 'static {
    /// Sends a request and waits for its reply. It may arrive more than once.
    fn request(&self, request: Outgoing) -> BoxFuture<'_, Result<Vec<u8>, Problem>>;

    /// Publishes an event; resolves once the broker keeps it.
    fn publish(&self, event: Published) -> BoxFuture<'_, Result<(), Problem>>;

    /// Begins to serve. Requests and events are delivered until [`Transport::drain`].
    fn serve(&self, service: Served);

    /// Takes nothing new any more, and resolves when what was begun is done.
    fn drain(&self) -> BoxFuture<'_, ()>;

    /// Whether the broker can be reached, and all that is served is being delivered.
    fn is_ready(&self) -> bool;
}
