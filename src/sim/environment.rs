//! The two environments, which share nothing but this process.

use std::fmt;

/// One of APNs' two environments. Each has a listener, devices, scripts and counters of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Environment {
    /// `api.push.apple.com`
    Production,
    /// `api.sandbox.push.apple.com`, which Xcode calls development
    #[serde(alias = "development")]
    Sandbox,
}

impl Environment {
    /// Both, in the order in which they are listed everywhere.
    pub const ALL: [Self; 2] = [Self::Production, Self::Sandbox];

    /// The name used in the control API.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Production => "production",
            Self::Sandbox => "sandbox",
        }
    }

    /// The other one.
    #[must_use]
    pub const fn other(self) -> Self {
        match self {
            Self::Production => Self::Sandbox,
            Self::Sandbox => Self::Production,
        }
    }
}

impl fmt::Display for Environment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// One value for each environment.
#[derive(Debug, Default, Clone)]
pub(super) struct PerEnvironment<T> {
    production: T,
    sandbox: T,
}

impl<T> PerEnvironment<T> {
    /// Makes both values.
    pub(super) fn new(mut make: impl FnMut(Environment) -> T) -> Self {
        Self { production: make(Environment::Production), sandbox: make(Environment::Sandbox) }
    }

    /// The value of `environment`.
    pub(super) const fn of(&self, environment: Environment) -> &T {
        match environment {
            Environment::Production => &self.production,
            Environment::Sandbox => &self.sandbox,
        }
    }
}
