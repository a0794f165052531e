//! A Galera cluster of three MariaDB nodes on this machine, to kill, freeze and start again one by one.
//!
//! Only where `TEST_CLUSTER=galera` asks for one (`make test-cluster`, which installs what it takes): plain tests do not
//! need Galera. The nodes commit durably and have Galera's own time-outs: one that falls silent is evicted after some
//! five seconds, in which the others cannot commit either.

use std::{fs::File, path::Path, process::Stdio};

use super::{
    database::{ANSWERS_WITHIN, PrivateServer, TestDatabase, find_program},
    ports::free_port,
    scratch::Process,
};

const NODES: usize = 3;

/// Where packages put the library that makes nodes of servers.
const LIBRARIES: [&str; 4] = [
    "/usr/lib/galera/libgalera_smm.so",
    "/usr/lib64/galera/libgalera_smm.so",
    "/usr/lib64/galera-4/libgalera_smm.so",
    "/usr/lib/galera-4/libgalera_smm.so",
];

const ADVICE: &str = "Galera is not installed: `make test-cluster` installs it on Debian and Ubuntu";

/// A node that takes part.
const SYNCED: &str = "SHOW GLOBAL STATUS WHERE Variable_name = 'wsrep_local_state_comment' AND Value = 'Synced'";

/// Whether the environment asks for a cluster.
pub(crate) fn wanted() -> bool {
    #[expect(clippy::disallowed_methods, reason = "the tests' own setting, not the service's")]
    let asked = std::env::var("TEST_CLUSTER").unwrap_or_default();
    match asked.as_str() {
        "" => false,
        "galera" => true,
        other => panic!("TEST_CLUSTER={other}: only `galera` is known"),
    }
}

pub(crate) struct Galera {
    nodes: Vec<PrivateServer>,
    /// How each is started when it comes back.
    again: Vec<Vec<String>>,
}

impl Galera {
    /// Starts the first node, and then the others from it: some ten seconds.
    pub(crate) async fn start() -> Result<Self, String> {
        let library = LIBRARIES.into_iter().find(|library| Path::new(library).is_file()).ok_or(ADVICE)?;
        let program = find_program(&["mariadbd"]).ok_or(ADVICE)?;
        let groups: Vec<u16> = (0..NODES).map(|_| free_port()).collect();
        let peers: Vec<String> = groups.iter().map(|port| format!("127.0.0.1:{port}")).collect();
        let peers = format!("--wsrep-cluster-address=gcomm://{}", peers.join(","));
        let mut cluster = Self { nodes: Vec::new(), again: Vec::new() };
        for (number, group) in groups.into_iter().enumerate() {
            // What comes over by rsync, which as root gives its privileges up, is the database's own user's.
            let mut node = PrivateServer::prepare(program.clone(), Some("mysql")).await?;
            let folder = node.folder().display().to_string();
            let (transfer, increment) = (free_port(), free_port());
            let mut options = vec![
                "--binlog-format=ROW".to_owned(),
                "--innodb-autoinc-lock-mode=2".to_owned(),
                "--wsrep-on=ON".to_owned(),
                format!("--wsrep-provider={library}"),
                "--wsrep-cluster-name=sonnette-tests".to_owned(),
                format!("--wsrep-node-name=node-{number}"),
                format!("--wsrep-node-address=127.0.0.1:{group}"),
                "--wsrep-sst-method=rsync".to_owned(),
                format!("--wsrep-sst-receive-address=127.0.0.1:{transfer}"),
                "--wsrep-slave-threads=2".to_owned(),
                format!(
                    "--wsrep-provider-options=gmcast.listen_addr=tcp://127.0.0.1:{group};\
                     ist.recv_addr=127.0.0.1:{increment};gcache.size=256M;gcache.dir={folder}/data"
                ),
            ];
            if number == 0 {
                node.options.extend_from_slice(&options);
                node.options.push("--wsrep-cluster-address=gcomm://".to_owned());
            }
            options.push(peers.clone());
            if number > 0 {
                node.options.clone_from(&options);
            }
            node.ready = SYNCED;
            node.try_restart().await.map_err(|error| format!("node {number}: {error}"))?;
            cluster.nodes.push(node);
            cluster.again.push(options);
        }
        Ok(cluster)
    }

    pub(crate) fn node(&self, number: usize) -> &PrivateServer {
        &self.nodes[number]
    }

    pub(crate) fn node_mut(&mut self, number: usize) -> &mut PrivateServer {
        &mut self.nodes[number]
    }

    /// Starts a node that was killed, from where it had come to, as the packages' own services do; it catches up with
    /// what the others have had since.
    pub(crate) async fn restart(&mut self, number: usize) {
        let node = &mut self.nodes[number];
        node.options.clone_from(&self.again[number]);
        let log = node.folder().join("recover.log");
        let to = File::create(&log).unwrap();
        let mut command = node.command();
        command.arg("--wsrep-recover").stdin(Stdio::null()).stdout(to.try_clone().unwrap()).stderr(to);
        let ended = Process::spawn(&mut command).unwrap().wait(ANSWERS_WITHIN).await;
        let log = String::from_utf8_lossy(&std::fs::read(&log).unwrap()).into_owned();
        let position = log.lines().find_map(|line| line.split_once("Recovered position: ").map(|(_, at)| at.trim()));
        let position = position.unwrap_or_else(|| panic!("no position was recovered: {ended:?}\n{log}"));
        node.options.push(format!("--wsrep-start-position={position}"));
        node.restart().await;
    }

    /// Waits until all nodes are one cluster again.
    pub(crate) async fn whole(&self) {
        let size = format!("SHOW GLOBAL STATUS WHERE Variable_name = 'wsrep_cluster_size' AND Value = '{NODES}'");
        for node in &self.nodes {
            for question in [&*size, SYNCED] {
                node.comes_to(question).await;
            }
        }
    }

    /// A fresh database on all nodes, asked at this one. It goes with the cluster.
    pub(crate) async fn database(&self, number: usize) -> TestDatabase {
        self.nodes[number].database().await
    }

    /// The address of this database with these nodes as hosts.
    pub(crate) fn url(&self, database: &TestDatabase, nodes: &[usize]) -> String {
        let (_, name) = database.url().rsplit_once('/').expect("an address has a path");
        let hosts: Vec<String> = nodes.iter().map(|node| format!("127.0.0.1:{}", self.nodes[*node].port())).collect();
        format!("mysql://sonnette:sonnette@{}/{name}", hosts.join(","))
    }
}
