//! The interface that a broker's client implements: it moves bytes between processes.
//!
//! Encryption, signatures and authorization are done above it.

use std::sync::Arc;
use std::time::Duration;

use capsule_contracts::Problem;
use futures_util::future::BoxFuture;

/// A request to the service that handles `subject`.
#[derive(Clone, Debug)]
pub struct OutgoingRequest {
    pub subject: &'static str,
    /// The sealed request.
    pub body: Vec<u8>,
    /// How long to wait for the reply.
    pub timeout: Duration,
}

/// An event to every service that subscribes to its kind.
#[derive(Clone, Debug)]
pub struct OutgoingEvent {
    /// `CloudEvents` `type`.
    pub kind: String,
    /// The partition key: a transport that keeps an order keeps it among events of one key.
    pub key: String,
    /// The envelope, as JSON.
    pub body: Vec<u8>,
    /// The body's signature with the installation's key.
    pub signature: String,
}

/// Why an event was not accepted.
#[derive(Debug)]
pub enum Rejection {
    /// Deliver it again later.
    Temporary(Problem),
    /// Do not deliver it again: it is malformed, or its signature is invalid.
    Permanent(Problem),
}

/// Handles a sealed request and returns the sealed reply.
pub type RequestHandler = Arc<dyn Fn(Vec<u8>) -> BoxFuture<'static, Vec<u8>> + Send + Sync>;
/// Stores an event (body and signature) in the service's inbox.
pub type EventHandler = Arc<dyn Fn(Vec<u8>, String) -> BoxFuture<'static, Result<(), Rejection>> + Send + Sync>;
/// Stores a message (body and reason) as a dead letter of the service, for operators.
pub type DeadLetterHandler = Arc<dyn Fn(Vec<u8>, String) -> BoxFuture<'static, Result<(), Problem>> + Send + Sync>;

/// A service's subscriptions and handlers.
#[derive(Clone)]
pub struct ServiceEndpoint {
    pub name: &'static str,
    /// The subjects of the requests it handles.
    pub subjects: Vec<&'static str>,
    /// The kinds of event it subscribes to.
    pub kinds: Vec<&'static str>,
    pub handle_request: RequestHandler,
    pub handle_event: EventHandler,
    pub store_dead_letter: DeadLetterHandler,
}

impl std::fmt::Debug for ServiceEndpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ServiceEndpoint({})", self.name)
    }
}

/// A connection to a broker, which reconnects by itself. A call waits for the connection until its timeout.
pub trait Transport: Send + Sync + 'static {
    /// Sends a request and waits for its reply. The request may be delivered more than once.
    fn request(&self, request: OutgoingRequest) -> BoxFuture<'_, Result<Vec<u8>, Problem>>;

    /// Publishes an event; resolves once the broker has confirmed it.
    fn publish(&self, event: OutgoingEvent) -> BoxFuture<'_, Result<(), Problem>>;

    /// Starts to deliver requests and events to a service, until [`Transport::drain`].
    fn serve(&self, service: ServiceEndpoint);

    /// Stops deliveries; resolves when those in flight are done.
    fn drain(&self) -> BoxFuture<'_, ()>;

    /// Whether the broker is connected and delivers to every service.
    fn is_ready(&self) -> bool;
}
