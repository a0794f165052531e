//! The 26 mistakes that providers of APNs make year after year, each with a test named after it that fails once the
//! protection is taken away. What is right comes from Apple's rules written down in the test, from the simulator's ledger
//! or from a server scripted by hand, never from our own tables.
//!
//! | | mistake | here | also |
//! |---|---|---|---|
//! | M1 | a provider token per request or per topic | `tokens::m01_…` | |
//! | M2 | replicas whose tokens mix on a connection | `tokens::m02_…` | `apns::token`'s golden bytes |
//! | M3 | a token changed soon after its connection opened | `tokens::m03_…` | `provider_token`, `apns::over_six_hours_…` |
//! | M4 | a storm of new tokens after an error | `tokens::m04_…` | `apns::too_many_token_updates_…`, `apns::a_refused_credential_…` |
//! | M5 | waiting for `ExpiredProviderToken` to renew | `tokens::m05_…` (two) | |
//! | M6 | GOAWAY ignored | `connections::m06_…` | `apns::streams_above_the_last_one_…` |
//! | M7 | what is in flight when a connection goes is lost, or doubled under another id | `connections::m07_…` | `kill`, `apns::what_a_goaway_promised_…` |
//! | M8 | a TCP connection that died in silence | `connections::m08_…` | `apns::a_silent_server_…`, `apns::a_connection_that_does_not_acknowledge_…` |
//! | M9 | connections of days | `connections::m09_…` | |
//! | M10 | no account of streams | `connections::m10_…` (two) | `apns::there_is_one_stream_…`, `apns::a_limit_that_falls_…` |
//! | M11 | a sandbox token sent to production destroys its device | `devices::m11_…` | |
//! | M12 | a 410 deletes a device that has registered again | `devices::m12_…` | `store::queue` |
//! | M13 | a wrong topic destroys devices | `devices::m13_…` (two) | `breaker` |
//! | M14 | reasons as a closed list | `answers::m14_…` | `apns::response` |
//! | M15 | tokens of 64 digits only | `devices::m15_…` | |
//! | M16 | a clock that is wrong | `tokens::m16_…` (three) | |
//! | M17 | milliseconds for seconds | `requests::m17_…` | |
//! | M18 | expiration 0 by default | `requests::m18_…` | |
//! | M19 | background pushes at priority 10, or no push type | `requests::m19_…` (two) | |
//! | M20 | answers matched by `apns-id` | `answers::m20_…` | |
//! | M21 | a connection per push | `connections::m21_…` | `apns::where_streams_are_scarce_…` |
//! | M22 | what is put off is tried again at once | `answers::m22_…` | `domain::delivery` |
//! | M23 | several credentials on one connection | `connections::m23_…` | `apns::two_credentials_…` |
//! | M24 | 410s counted as uninstalls | `devices::m24_…` | |
//! | M25 | `{}` taken for no body | `requests::m25_…` | `domain::payload` |
//! | M26 | a trust store without the root | `connections::m26_…` | `apns::a_server_that_nobody_vouches_for_…` |

mod answers;
mod connections;
mod devices;
mod requests;
mod tokens;
