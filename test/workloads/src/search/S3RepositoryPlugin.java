package search;

import java.util.Map;
import org.opensearch.cluster.metadata.RepositoryMetadata;
import org.opensearch.cluster.service.ClusterService;
import org.opensearch.common.blobstore.BlobPath;
import org.opensearch.common.blobstore.BlobStore;
import org.opensearch.core.xcontent.NamedXContentRegistry;
import org.opensearch.env.Environment;
import org.opensearch.indices.recovery.RecoverySettings;
import org.opensearch.plugins.Plugin;
import org.opensearch.plugins.RepositoryPlugin;
import org.opensearch.repositories.Repository;
import org.opensearch.repositories.blobstore.BlobStoreRepository;

/**
 * Snapshot repositories of type {@code s3}. OpenSearch's own plugin for them is not among its Maven artifacts; this one
 * has the same operations underneath, with the same SDK. Settings: endpoint, bucket, base_path; credentials come from
 * the environment.
 */
public final class S3RepositoryPlugin extends Plugin implements RepositoryPlugin {
  @Override
  public Map<String, Repository.Factory> getRepositories(
      Environment environment, NamedXContentRegistry registry, ClusterService cluster, RecoverySettings recovery) {
    return Map.of("s3", metadata -> new S3Repository(metadata, registry, cluster, recovery));
  }

  private static final class S3Repository extends BlobStoreRepository {
    private final RepositoryMetadata metadata;

    S3Repository(RepositoryMetadata metadata, NamedXContentRegistry registry, ClusterService cluster, RecoverySettings recovery) {
      super(metadata, registry, cluster, recovery);
      this.metadata = metadata;
    }

    @Override
    protected BlobStore createBlobStore() {
      var settings = metadata.settings();
      return new S3BlobStore(settings.get("endpoint"), settings.get("bucket"));
    }

    @Override
    public BlobPath basePath() {
      return BlobPath.cleanPath().add(metadata.settings().get("base_path"));
    }
  }
}
