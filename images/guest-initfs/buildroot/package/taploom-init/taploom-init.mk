################################################################################
#
# taploom-init
#
################################################################################

TAPLOOM_INIT_SITE = $(TAPLOOM_CHECKOUT)/images/init
TAPLOOM_INIT_SITE_METHOD = local

define TAPLOOM_INIT_BUILD_CMDS
	$(TARGET_CC) $(TARGET_CFLAGS) -std=c11 -D_GNU_SOURCE -Wall -Wextra -Werror \
		$(@D)/*.c $(TARGET_LDFLAGS) -static -o $(@D)/taploom-init
endef

define TAPLOOM_INIT_INSTALL_TARGET_CMDS
	$(INSTALL) -D -m 0755 $(@D)/taploom-init $(TARGET_DIR)/usr/sbin/taploom-init
	ln -sf usr/sbin/taploom-init $(TARGET_DIR)/init
	for name in init poweroff reboot halt shutdown; do \
		ln -sf taploom-init $(TARGET_DIR)/usr/sbin/$$name || exit 1; \
	done
endef

$(eval $(generic-package))
