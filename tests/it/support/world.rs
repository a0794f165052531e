//! A small world: the real service as `app` builds it, the simulator, a real database, one clock; all on free ports.

use std::{collections::BTreeMap, future::Future, path::PathBuf, sync::Arc, time::Duration};

use serde_json::{Value, json};
use sonnette::{
    apns::credential,
    app::{App, Options},
    cli::make_api_key,
    config::Config,
    domain::{
        api_key::Scope,
        clock::{Clock, ManualClock, SystemClock},
    },
    sim::{self, Simulator},
};

use super::{apns_server::Server, client::Client, database::TestDatabase, scratch::Folder};

/// The app that all worlds have.
pub(crate) const TOPIC: &str = "fr.ocpizza.livreur";
/// Its team.
pub(crate) const TEAM: &str = "ABCDE12345";
/// Its key.
pub(crate) const KEY_ID: &str = "ABC123DEFG";

/// How long a condition is waited for: far longer than it takes, so that only a fault reaches it.
const PATIENCE: Duration = Duration::from_secs(60);

/// Every scope a server's key may have.
pub(crate) const SERVER: [Scope; 4] = [Scope::Register, Scope::Send, Scope::Read, Scope::Admin];

pub(crate) struct World {
    pub(crate) app: Option<App>,
    pub(crate) sim: Simulator,
    /// A server's key: register, send, read, admin.
    pub(crate) server: Client,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) config: Config,
    pub(crate) folder: Folder,
    _database: TestDatabase,
}

/// Writes a fresh .p8 and apps.toml with one app that both environments serve. Returns the folder.
pub(crate) fn keys_folder(folder: &Folder, more: &str) -> PathBuf {
    let keys = folder.path().join("keys");
    std::fs::create_dir_all(&keys).unwrap();
    std::fs::write(keys.join("key.p8"), credential::generate().unwrap().expose()).unwrap();
    write_apps(&keys, TEAM, more);
    keys
}

/// Writes apps.toml anew.
pub(crate) fn write_apps(keys: &std::path::Path, team: &str, more: &str) {
    let app = format!(
        "[[app]]\ntopic = \"{TOPIC}\"\nteam_id = \"{team}\"\nkey_id = \"{KEY_ID}\"\nkey_file = \"key.p8\"\n{more}\n"
    );
    std::fs::write(keys.join("apps.toml"), app).unwrap();
}

impl World {
    /// On the machine's clock.
    pub(crate) async fn start(database: TestDatabase) -> Self {
        Self::with(database, Arc::new(SystemClock::new()), "").await
    }

    /// On any clock, with more lines for the app in apps.toml.
    pub(crate) async fn with(database: TestDatabase, clock: Arc<dyn Clock>, more: &str) -> Self {
        Self::configured(database, clock, more, |_, _| {}).await
    }

    /// The same, with a last word on the configuration: where APNs is, for one.
    pub(crate) async fn configured(
        database: TestDatabase,
        clock: Arc<dyn Clock>,
        more: &str,
        change: impl FnOnce(&mut Config, &Simulator),
    ) -> Self {
        let folder = Folder::new("world");
        let keys = keys_folder(&folder, more);
        let sim = Simulator::start(
            sim::Settings {
                folder: folder.path().join("simulator"),
                keys: sim::read_folder(&keys).unwrap(),
                ..sim::Settings::default()
            },
            Arc::clone(&clock),
        )
        .await
        .unwrap();
        let file = folder.path().join("sonnette.toml");
        let text = format!(
            "[server]\nlisten = \"127.0.0.1:0\"\n[database]\nurl = \"{}\"\n[apns]\nkeys = \"keys\"\nproduction = \"https://{}\"\nsandbox = \"https://{}\"\nca_file = \"{}\"\n",
            database.url(),
            sim.production(),
            sim.sandbox(),
            sim.ca_file().display(),
        );
        std::fs::write(&file, text).unwrap();
        let mut config = Config::load(Some(&file), &BTreeMap::new()).unwrap();
        change(&mut config, &sim);
        let app = App::start(&config, Arc::clone(&clock), Options::default()).await.unwrap();
        let server = Client::new(app.address(), None);
        let mut world = Self { app: Some(app), sim, server, clock, config, folder, _database: database };
        let key = world.key("back-office", &SERVER).await;
        world.server = world.server.with_key(&key);
        world
    }

    /// The running service.
    pub(crate) fn app(&self) -> &App {
        self.app.as_ref().expect("the service runs")
    }

    /// With a server scripted by hand where APNs' production is.
    pub(crate) async fn before(server: &Server, database: TestDatabase, clock: Arc<dyn Clock>) -> Self {
        Self::configured(database, clock, "environments = [\"production\"]", |config, _| {
            let ca_file = config.apns.ca_file.as_mut().unwrap();
            ca_file.set_file_name("server.pem");
            std::fs::write(ca_file, &server.ca_pem).unwrap();
            config.apns.production = server.url();
        })
        .await
    }

    /// A new API key for all apps.
    pub(crate) async fn key(&self, owner: &str, scopes: &[Scope]) -> String {
        let (presented, key) = make_api_key(owner, scopes.iter().copied(), None, None, self.clock.now());
        self.app().store().add_api_key(&key).await.unwrap();
        presented.reveal()
    }

    /// A caller with a new key of these scopes.
    pub(crate) async fn caller(&self, scopes: &[Scope]) -> Client {
        self.server.with_key(&self.key("caller", scopes).await)
    }

    /// Stops the service in good order and starts it again on the same database.
    pub(crate) async fn restart(&mut self) {
        let app = self.app.take().expect("the service runs");
        assert!(app.shutdown(PATIENCE).await, "the service stops in good order");
        self.start_again().await;
    }

    /// The same on a clock that moves only when told: it moves while the service stops, should that take longer. What
    /// the database has refused, on a busy machine, is tried again after a pause of that clock.
    pub(crate) async fn restart_on(&mut self, clock: &ManualClock) {
        let app = self.app.take().expect("the service runs");
        let stopped = app.shutdown(PATIENCE);
        tokio::pin!(stopped);
        loop {
            tokio::select! {
                stopped = &mut stopped => {
                    assert!(stopped, "the service stops in good order");
                    break;
                }
                () = tokio::time::sleep(Duration::from_millis(200)) => clock.advance(Duration::from_millis(250)),
            }
        }
        self.start_again().await;
    }

    async fn start_again(&mut self) {
        let app = App::start(&self.config, Arc::clone(&self.clock), Options::default()).await.unwrap();
        let key = {
            self.app = Some(app);
            self.key("back-office", &SERVER).await
        };
        self.server = Client::new(self.app().address(), Some(&key));
    }

    /// Registers a phone; returns its id.
    pub(crate) async fn device(&self, token: &str, user: Option<&str>) -> String {
        let mut body = json!({ "token": token, "topic": TOPIC });
        if let Some(user) = user {
            body["user_id"] = json!(user);
        }
        self.server.post("/v1/devices", &body).await.ok()["id"].as_str().unwrap().to_owned()
    }

    /// Sends an alert; returns the notification's id.
    pub(crate) async fn send(&self, to: Value) -> String {
        self.send_with(to, json!({})).await
    }

    /// Sends an alert with more fields; returns the notification's id.
    pub(crate) async fn send_with(&self, to: Value, more: Value) -> String {
        let mut body = json!({ "topic": TOPIC, "to": to, "payload": { "aps": { "alert": { "title": "Bonjour" } } } });
        for (field, value) in more.as_object().unwrap() {
            body[field] = value.clone();
        }
        let answer = self.server.post("/v1/notifications", &body).await;
        assert_eq!(answer.status, 202, "{}", answer.text);
        answer.body["id"].as_str().unwrap().to_owned()
    }

    /// How a notification stands.
    pub(crate) async fn notification(&self, id: &str) -> Value {
        let seen = self.server.get(&format!("/v1/notifications/{id}")).await.ok();
        let counts = &seen["counts"];
        let sum: u64 =
            ["pending", "accepted", "failed", "unregistered", "expired", "cancelled", "suppressed", "unknown"]
                .iter()
                .map(|word| counts[word].as_u64().unwrap())
                .sum();
        assert_eq!(counts["targeted"].as_u64().unwrap(), sum, "the counts add up: {counts}");
        seen
    }

    /// Waits until a notification is done, and returns it.
    pub(crate) async fn done(&self, id: &str) -> Value {
        until("the notification is done", || async {
            let seen = self.notification(id).await;
            (seen["status"] == "done").then_some(seen)
        })
        .await
    }

    /// The deliveries of a notification.
    pub(crate) async fn deliveries(&self, id: &str) -> Vec<Value> {
        let page = self.server.get(&format!("/v1/notifications/{id}/deliveries?limit=1000")).await.ok();
        page["items"].as_array().unwrap().clone()
    }

    /// Whether APNs has answered all that it was sent.
    pub(crate) fn is_answered(&self) -> bool {
        self.app().routes().iter().all(|route| route.in_flight == 0)
    }

    /// The one check of health with this name and component.
    pub(crate) async fn check(&self, name: &str, component: &str) -> Option<Value> {
        let report = self.server.get("/health").await;
        let checks = report.body["checks"][name].as_array()?.clone();
        checks.into_iter().find(|c| c["component_id"].as_str().unwrap_or_default().contains(component))
    }
}

/// Waits for a condition with a bound; returns what it found.
pub(crate) async fn until<T, F>(what: &str, look: impl FnMut() -> F) -> T
where
    F: Future<Output = Option<T>>,
{
    until_within(PATIENCE, what, look).await
}

/// The same in a long run.
pub(crate) async fn patiently<T, F: Future<Output = Option<T>>>(what: &str, look: impl FnMut() -> F) -> T {
    until_within(Duration::from_secs(1_800), what, look).await
}

async fn until_within<T, F: Future<Output = Option<T>>>(
    patience: Duration,
    what: &str,
    mut look: impl FnMut() -> F,
) -> T {
    let deadline = std::time::Instant::now() + patience;
    loop {
        if let Some(found) = look().await {
            return found;
        }
        assert!(std::time::Instant::now() < deadline, "waited in vain until {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Lets about a second pass, until the service's heart has beaten: time that leaps ahead of the heart would make the
/// service distrust its own leases, as it should. And until the database has taken a commit by the way that the work goes,
/// which the heart does not: on a slow one time goes slowly.
pub(crate) async fn tick(world: &World, clock: &ManualClock) {
    let beat = || async { world.app().store().replicas().await.unwrap()[0].beat };
    let before = beat().await;
    let mut looks = 0;
    until("the heart beats", || {
        // Seldom once it is due, and while APNs is to answer: time should not run ahead of a slow machine.
        if (looks < 5 && world.is_answered()) || looks % 10 == 0 {
            clock.advance(Duration::from_millis(250));
        }
        looks += 1;
        async { (beat().await > before).then_some(()) }
    })
    .await;
    world.app().store().probe(clock.now()).await.unwrap();
}

/// Lets time pass until a condition holds. The bound is one of the clock's: how fast it runs is the machine's affair.
pub(crate) async fn ticking<T, F>(world: &World, clock: &ManualClock, what: &str, mut look: impl FnMut() -> F) -> T
where
    F: Future<Output = Option<T>>,
{
    let deadline = clock.monotonic() + Duration::from_secs(3_600);
    loop {
        tick(world, clock).await;
        if let Some(found) = look().await {
            return found;
        }
        assert!(clock.monotonic() < deadline, "an hour passed in vain until {what}");
    }
}

/// Lets time pass until a notification is done, and returns it.
pub(crate) async fn ticking_until_done(world: &World, clock: &ManualClock, id: &str) -> Value {
    ticking(world, clock, "the notification is done", || async {
        let seen = world.notification(id).await;
        (seen["status"] == "done").then_some(seen)
    })
    .await
}
