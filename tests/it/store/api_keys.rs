//! API keys as they are kept.

use sonnette::domain::{
    api_key::{ApiKey, PresentedKey, Scope},
    secret::Secret,
};

use super::{NOW, later, store};
use crate::support::database::on_both_stores;

fn key(id: u8) -> (PresentedKey, ApiKey) {
    let presented = PresentedKey::from_random([id; 8], [7; 32]);
    let kept = ApiKey {
        id: presented.id.clone(),
        hash: Secret::new(presented.hash()),
        owner: "Boutique n° 7 🍕".to_owned(),
        scopes: [Scope::Send, Scope::Read].into(),
        topics: None,
        created_at: later(u64::from(id)),
        expires_at: None,
        revoked_at: None,
    };
    (presented, kept)
}

on_both_stores! {
    async fn a_key_is_read_back_as_it_was_kept(database) {
        let store = store(&database).await;
        let (presented, mut kept) = key(1);
        store.add_api_key(&kept).await.unwrap();
        let found = store.api_key(&kept.id).await.unwrap().unwrap();
        assert!(found.is(&presented));
        assert_eq!((found.owner, found.scopes, found.topics), (kept.owner.clone(), kept.scopes.clone(), None));

        kept.id = key(2).1.id;
        kept.topics = Some(["fr.ocpizza.livreur".parse().unwrap(), "fr.ocpizza.client".parse().unwrap()].into());
        kept.expires_at = Some(later(60));
        store.add_api_key(&kept).await.unwrap();
        let found = store.api_key(&kept.id).await.unwrap().unwrap();
        assert_eq!((found.topics, found.expires_at), (kept.topics.clone(), kept.expires_at));

        kept.id = key(3).1.id;
        kept.topics = Some([].into());
        store.add_api_key(&kept).await.unwrap();
        assert_eq!(store.api_key(&kept.id).await.unwrap().unwrap().topics, Some([].into()), "for no app is not for all");
        assert!(store.api_key(&key(9).1.id).await.unwrap().is_none());
    }

    async fn keys_are_listed_newest_first_revoked_ones_too(database) {
        let store = store(&database).await;
        for id in [1, 3, 2] {
            store.add_api_key(&key(id).1).await.unwrap();
        }
        assert!(store.revoke_api_key(&key(2).1.id, NOW).await.unwrap());
        assert!(store.revoke_api_key(&key(2).1.id, later(60)).await.unwrap());
        assert!(!store.revoke_api_key(&key(9).1.id, NOW).await.unwrap());
        let all = store.api_keys().await.unwrap();
        assert_eq!(all.iter().map(|k| &k.id).collect::<Vec<_>>(), [&key(3).1.id, &key(2).1.id, &key(1).1.id]);
        assert_eq!(all[1].revoked_at, Some(NOW), "since the first time");
    }
}
