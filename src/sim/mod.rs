//! An APNs of our own, for tests, for `sonnette demo` and for `sonnette simulator`.
//!
//! Promises: it speaks real TLS and HTTP/2, refuses what APNs refuses in the order of `apns-protocol.md` §13, can be
//! scripted, and keeps a ledger of what arrived, so that tests assert on what was received and not on what was meant to
//! be sent. It shares no code with the client in `apns`: its tables and limits are its own, or a mistake in one would
//! be hidden by the other. Where Apple is silent it is the stricter of the possibilities.
//!
//! | file | subject |
//! |---|---|
//! | `certificate` | the CA and the server certificate |
//! | `server`, `connection` | listening; one HTTP/2 connection |
//! | `frames` | SETTINGS and GOAWAY, which `h2` cannot write as we need them |
//! | `check`, `provider_token`, `devices` | the checks |
//! | `reason`, `push_type` | the tables |
//! | `keys`, `client_certificate` | provider keys, client certificates |
//! | `fault` | scripted answers, and device tokens that force an answer |
//! | `chaos` | faults by rate, from a seed |
//! | `conduct` | how an environment conducts itself on a bad day |
//! | `door` | letting new TCP connections in, or not |
//! | `gate` | holding, slowing and sending away a whole environment |
//! | `rate`, `phones` | how much a device takes; what it shows, and what is stored for it |
//! | `ledger`, `ledger/truth` | what arrived; what became of every push |
//! | `receipts` | which answers the client has certainly read |
//! | `control` | all of it over plain HTTP |
//!
//! Known gaps: broadcasts (`/4/broadcasts/…`) and channel management are answered `404 BadPath`.

mod certificate;
mod chaos;
mod check;
mod client_certificate;
mod conduct;
mod connection;
mod control;
mod devices;
mod door;
mod environment;
mod fault;
mod frames;
mod gate;
mod identifiers;
mod keys;
mod ledger;
mod phones;
mod provider_token;
mod push_type;
mod rate;
mod reason;
mod receipts;
mod server;

use std::{
    fmt, io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use self::rate::Rates;
pub use self::{
    certificate::CertificateError,
    chaos::{Chaos, ChaosApplied, ChaosError, ChaosPlan, Latency, RatedFault},
    check::{MAX_COLLAPSE_ID_BYTES, MAX_EXPIRATION_SECONDS},
    client_certificate::{ClientCertificate, ClientCertificates, KnownCertificate, NotACertificate},
    conduct::{
        AfterTokenError, Conduct, ConductError, DeviceRate, ErrorBody, ExpiredToken, FirstSettings, IdleEnd,
        IdleTimeout, MessageId, RetryAfter,
    },
    devices::{Device, Devices, MAX_TOKEN_BYTES, is_well_formed},
    door::Connects,
    environment::Environment,
    fault::{ANY_TOKEN, Action, Behaviour, LastStream, PREFIX, PREFIXES, Script, Scripts},
    gate::{GateState, Gates, GoAwayOrder, WedgeError, WedgeOrder},
    keys::{KeyError, Keys, ProviderKey, Topics, read_folder},
    ledger::{
        ConnectionSeen, Counters, Ledger, ProviderTokenSeen, Push, PushQuery, Repeat, Summary, TokenSwitch, Truth,
        TruthQuery, Verdict,
    },
    phones::{MAX_PHONES, MAX_SHOWN, MAX_STORED, Notification, Phone, PhoneError, Phones},
    provider_token::{MAX_AGE, MIN_TIME_BETWEEN_CHANGES},
    push_type::{MAX_BODY_BYTES, MAX_VOIP_BODY_BYTES, PushType, bundle_id},
    reason::Reason,
};
use crate::domain::clock::Clock;

/// How a simulator is set up.
#[derive(Debug, Clone)]
#[expect(clippy::struct_excessive_bools, reason = "independent switches, as on the command line")]
pub struct Settings {
    /// Where production listens; port 0 takes a free one.
    pub production: SocketAddr,
    /// Where the sandbox listens.
    pub sandbox: SocketAddr,
    /// Where the control API listens, in plain HTTP and without any authentication: keep it on this machine.
    pub control: SocketAddr,
    /// The folder of the certificate authority; made if absent.
    pub folder: PathBuf,
    /// Names and addresses of the server certificate besides `localhost`, `127.0.0.1` and `::1`.
    pub names: Vec<String>,
    /// The provider keys known from the start.
    pub keys: Vec<ProviderKey>,
    /// `MAX_CONCURRENT_STREAMS` before the first accepted provider token.
    pub initial_stream_limit: u32,
    /// `MAX_CONCURRENT_STREAMS` behind it.
    pub stream_limit: u32,
    /// How long every answer waits.
    pub latency: Duration,
    /// Whether the ledger keeps the truth about every push: about 125 bytes each until it is cleared, and a PING for
    /// every round trip with answers. Else it only counts, and finds no repeats.
    pub record_attempts: bool,
    /// Whether the ledger keeps accepted pushes one by one; counters are kept in any case.
    pub record_pushes: bool,
    /// How many it keeps, the newest; each costs about 120 bytes and its token and body.
    pub max_recorded_pushes: usize,
    /// What goes wrong by rate in both environments; absent: nothing.
    pub chaos: Option<ChaosPlan>,
    /// Whether device tokens nobody registered are `BadDeviceToken`.
    pub registered_devices_only: bool,
    /// Whether a key of the other environment is refused with `BadEnvironmentKeyInToken`, as others saw it on the wire,
    /// and not with the documented `BadEnvironmentKeyIdInToken`.
    pub wire_spelling: bool,
    /// How both environments conduct themselves at first.
    pub conduct: Conduct,
}

impl Default for Settings {
    /// On this machine, on free ports, with Apple's numbers, without keys, the authority in `./simulator`.
    fn default() -> Self {
        let any = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);
        Self {
            production: any,
            sandbox: any,
            control: any,
            folder: PathBuf::from("simulator"),
            names: Vec::new(),
            keys: Vec::new(),
            initial_stream_limit: 1,
            stream_limit: 1000,
            latency: Duration::ZERO,
            record_attempts: true,
            record_pushes: true,
            max_recorded_pushes: 100_000,
            chaos: None,
            registered_devices_only: false,
            wire_spelling: false,
            conduct: Conduct::default(),
        }
    }
}

/// Why a simulator did not start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An address cannot be listened on.
    #[error("the {listener} listener cannot have {address}")]
    Listen {
        /// `production`, `sandbox` or `control`.
        listener: &'static str,
        /// The address asked for.
        address: SocketAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The certificate authority.
    #[error(transparent)]
    Certificate(#[from] CertificateError),
    /// A provider key.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// The plan of what goes wrong.
    #[error("what shall go wrong by rate is not clear")]
    Chaos(#[from] ChaosError),
}

/// What every task of a simulator shares.
#[derive(Debug)]
struct State {
    clock: Arc<dyn Clock>,
    wire_spelling: bool,
    keys: Keys,
    client_certificates: ClientCertificates,
    devices: Devices,
    phones: Phones,
    rates: Rates,
    scripts: Scripts,
    gates: Gates,
    chaos: Chaos,
    ledger: Ledger,
    ca_pem: String,
    tasks: TaskTracker,
    stop: CancellationToken,
}

/// A running simulator. Dropping it stops it; [`Simulator::shutdown`] also waits until it has stopped.
pub struct Simulator {
    state: Arc<State>,
    production: SocketAddr,
    sandbox: SocketAddr,
    control: SocketAddr,
    ca_file: PathBuf,
}

impl fmt::Debug for Simulator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Simulator")
            .field("production", &self.production)
            .field("sandbox", &self.sandbox)
            .field("control", &self.control)
            .finish_non_exhaustive()
    }
}

impl Simulator {
    /// Starts listening. When this returns, connections are accepted.
    ///
    /// # Errors
    /// [`Error`] names what is in the way. Nothing is left running then.
    pub async fn start(settings: Settings, clock: Arc<dyn Clock>) -> Result<Self, Error> {
        let authority = certificate::Authority::open(&settings.folder)?;
        let acceptor = TlsAcceptor::from(Arc::new(authority.server_config(&settings.names)?));
        let keys = Keys::default();
        for key in settings.keys {
            keys.register(key)?;
        }
        let devices = Devices::default();
        devices.require_registration(settings.registered_devices_only);
        let ledger = Ledger::new(ledger::Limits {
            record_attempts: settings.record_attempts,
            record_pushes: settings.record_pushes,
            max_pushes: settings.max_recorded_pushes,
        });
        let chaos = Chaos::new(ledger.clone());
        if let Some(plan) = settings.chaos {
            for environment in Environment::ALL {
                chaos.set(environment, plan.clone())?;
            }
        }
        let (production, production_address) = bind("production", settings.production).await?;
        let (sandbox, sandbox_address) = bind("sandbox", settings.sandbox).await?;
        let (control, control_address) = bind("control", settings.control).await?;
        let state = Arc::new(State {
            wire_spelling: settings.wire_spelling,
            keys,
            client_certificates: ClientCertificates::default(),
            devices,
            phones: Phones::new(Arc::clone(&clock)),
            rates: Rates::default(),
            scripts: Scripts::default(),
            gates: Gates::new(settings.initial_stream_limit, settings.stream_limit, settings.latency, settings.conduct),
            chaos,
            ledger,
            clock,
            ca_pem: authority.pem,
            tasks: TaskTracker::new(),
            stop: CancellationToken::new(),
        });
        for (environment, listener) in [(Environment::Production, production), (Environment::Sandbox, sandbox)] {
            state.tasks.spawn(server::listen(Arc::clone(&state), environment, listener, acceptor.clone()));
        }
        state.tasks.spawn(control::serve(Arc::clone(&state), control));
        state.tasks.close();
        Ok(Self {
            state,
            production: production_address,
            sandbox: sandbox_address,
            control: control_address,
            ca_file: authority.file,
        })
    }

    /// Where production listens.
    #[must_use]
    pub const fn production(&self) -> SocketAddr {
        self.production
    }

    /// Where the sandbox listens.
    #[must_use]
    pub const fn sandbox(&self) -> SocketAddr {
        self.sandbox
    }

    /// Where `environment` listens.
    #[must_use]
    pub const fn address(&self, environment: Environment) -> SocketAddr {
        match environment {
            Environment::Production => self.production,
            Environment::Sandbox => self.sandbox,
        }
    }

    /// Where the control API listens.
    #[must_use]
    pub const fn control(&self) -> SocketAddr {
        self.control
    }

    /// The certificate that clients must trust, in PEM.
    #[must_use]
    pub fn ca_pem(&self) -> &str {
        &self.state.ca_pem
    }

    /// Its file.
    #[must_use]
    pub fn ca_file(&self) -> &Path {
        &self.ca_file
    }

    /// What arrived.
    #[must_use]
    pub fn ledger(&self) -> Ledger {
        self.state.ledger.clone()
    }

    /// What is answered to whom.
    #[must_use]
    pub fn scripts(&self) -> Scripts {
        self.state.scripts.clone()
    }

    /// The provider keys.
    #[must_use]
    pub fn keys(&self) -> Keys {
        self.state.keys.clone()
    }

    /// The client certificates.
    #[must_use]
    pub fn client_certificates(&self) -> ClientCertificates {
        self.state.client_certificates.clone()
    }

    /// The devices.
    #[must_use]
    pub fn devices(&self) -> Devices {
        self.state.devices.clone()
    }

    /// What devices show, and what is stored for them.
    #[must_use]
    pub fn phones(&self) -> Phones {
        self.state.phones.clone()
    }

    /// What goes wrong by rate.
    #[must_use]
    pub fn chaos(&self) -> Chaos {
        self.state.chaos.clone()
    }

    /// Holding, slowing, sending away.
    #[must_use]
    pub fn gates(&self) -> Gates {
        self.state.gates.clone()
    }

    /// Sends GOAWAY to every connection, closes them, and waits until every task has ended.
    pub async fn shutdown(self) {
        self.state.stop.cancel();
        self.state.tasks.wait().await;
    }
}

impl Drop for Simulator {
    fn drop(&mut self) {
        self.state.stop.cancel();
    }
}

async fn bind(listener: &'static str, address: SocketAddr) -> Result<(TcpListener, SocketAddr), Error> {
    let failed = |source| Error::Listen { listener, address, source };
    let socket = TcpListener::bind(address).await.map_err(failed)?;
    let bound = socket.local_addr().map_err(failed)?;
    Ok((socket, bound))
}
